"""What both doubles share: an operator of TorchScript in the namespace `neuron`, a compiler, and cores that processes own.

A double keeps the contract that the code under test relies on, and breaks it in the ways in which the real thing does:
TorchScript itself tells of an unknown operator, a shape or dtype that was not compiled is refused, a core belongs to one
process. It computes on the CPU. What it cannot show: what AWS's compiler accepts, how fast a chip is, its memory.

By environment variables, each read when it matters:

    NEURON_DOUBLE_CORES     how many cores this machine has; default 4 (an inf1.xlarge); 0: no chip, no driver
    NEURON_DOUBLE_FOLDER    where the locks of the cores lie; default /tmp/neuron-double
    NEURON_DOUBLE_COMPILER  "fails": every compilation fails; "places nothing": a warning, and a module on the CPU;
                            "share=0.6": so much of the operators is placed on the chip, the others stay on the CPU
    NEURON_DOUBLE_SECONDS   how long the compiler takes for a graph; default 0
    NEURON_DOUBLE_NOISE     "bfloat16" (default): weights are rounded to it; "none"; a number: outputs are off by so much,
                            relative to the largest
    NEURON_DOUBLE_TORCH     the version of torch that the package was built for, as "1.13."; by default any

NEURON_RT_NUM_CORES and NEURON_RT_VISIBLE_CORES are read as Neuron's runtime reads them.
"""
