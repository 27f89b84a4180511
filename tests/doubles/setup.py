"""Contract doubles of AWS's torch-neuron and torch-neuronx, for the tests of a machine without their chips."""

from setuptools import setup

setup(
    name="traceserve-neuron-doubles",
    version="0.1",
    description=__doc__,
    python_requires=">=3.8",
    packages=["neuron_double", "torch_neuron", "torch_neuronx"],
    entry_points={"console_scripts": ["neuron-ls=neuron_double.tool:main"]},
)
