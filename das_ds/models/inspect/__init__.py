"""`das-ds inspect`: the unit table of an architecture, proposed from what a small network of its class computes.

Read the files in this order:

1. `probe.py` builds a small network of the class with random weights; the real model's weights are never loaded.
2. `trace.py` runs one layer of it and records which linear layer feeds which.
3. `structure.py` finds what surrounds the layers: their names, the LM head, the positions.
4. `propose.py` turns both into an `ArchitectureSpec`: **propose**.
5. `verify.py` closes unit gates and compares the gradients with the spec: **verify**.
6. `describe.py` prints the spec, proposed or registered, with the verdict: **describe**.
"""
