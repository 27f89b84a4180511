"""The serving side of traceserve: it travels in every archive, and answers inside TorchServe's worker or another host's process.

It needs numpy, tokenizers and the library of its save mode (torch for torchscript). It never imports the
builder's package, and never touches the network. Its interface to the builder is the document `traceserve.json`, which
`manifest.py` describes.
"""

__version__ = "0.2.0"
