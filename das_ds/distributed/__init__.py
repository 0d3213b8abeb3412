"""Ranks, collectives and the ZeRO engine; the only importer of deepspeed and torch.distributed."""
