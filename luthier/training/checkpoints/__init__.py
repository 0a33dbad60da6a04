"""Checkpoints: how one is written, chosen and read, and what has to be as it was when a run goes on.

store.py          written so that one is whole at every moment; which one to resume from; old ones removed
weights.py        those of a checkpoint, loaded into the model of a run
split_state.py    the optimizer of layers that processes share
shared_save.py    a save that all processes make together
foreign.py        checkpoints of LLaMA-Factory and other programs with the trainer of transformers
trained_on.py     the rows of a checkpoint are those of the run
row_order.py      and come in the same order
kept_settings.py  settings of the optimizer that stay
resumed_rates.py  learning rates of the first step
"""
