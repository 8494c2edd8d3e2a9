"""The regression gate: is this version of the code as good as that one, and how sure is the answer?

    tier 0   what never varies: parameters, FLOPs, state bytes, operators, first gradients; every change must be said
    tier 1   quality: exactly equal on the same kind of processor, equivalent within the noise of seeds on another
    tier 2   time: two versions in lock-step on one machine
    tier 3   history: steps in a series of runs; shown, never blocking

Each finds what became of every quantity (`verdict`); all of it together is an exit code. docs/gate.md tells how
to use it.
"""
