"""The serving side of traceserve: what travels in every archive and answers inside the TorchServe worker.

It needs numpy, tokenizers and the one library that its save mode names (torch for torchscript). It never imports the
builder's package, and never touches the network. The border to the builder is the document `traceserve.json`, which
`manifest.py` describes.
"""

__version__ = "0.1.0"
