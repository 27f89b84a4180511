"""The parts common to both doubles: a TorchScript operator in the namespace `neuron`, a compiler, and cores owned by
processes.

A double keeps the contract that the tested code relies on, and fails in the same ways as the real thing: TorchScript
itself reports an unknown operator, shapes or dtypes that were not compiled are refused, a core belongs to one process.
It computes on the CPU. It cannot show what AWS's compiler accepts, a chip's speed, or its memory.

Environment variables, each read when needed:

    NEURON_DOUBLE_CORES     this machine's number of cores; default 4 (an inf1.xlarge); 0: no chip, no driver
    NEURON_DOUBLE_FOLDER    the folder of the cores' locks; default /tmp/neuron-double
    NEURON_DOUBLE_COMPILER  "fails": every compilation fails; "places nothing": a warning, and a module on the CPU;
                            "share=0.6": this share of the operators is placed on the chip, the others stay on the CPU
    NEURON_DOUBLE_SECONDS   the compiler's seconds per graph; default 0
    NEURON_DOUBLE_NOISE     "bfloat16" (default): weights are rounded to it; "none"; a number: the outputs' error,
                            relative to the largest
    NEURON_DOUBLE_TORCH     the torch version that the package was built for, such as "1.13."; default any

NEURON_RT_NUM_CORES and NEURON_RT_VISIBLE_CORES are read as in Neuron's runtime.
"""
