"""What a run will do and need, known before a weight is loaded.

work.py        rows, tokens, steps, the largest batch
shape.py       the model without its weights, as training will see it
trace.py       one training step of that model: bytes in memory and products, without computing anything
memory.py      the peak of the process, part by part
engine.py      how several processes share the model: ddp, fsdp2, zero1 to zero3
groups.py      the weights that FSDP 2 gathers at a time
sharing.py     what one of several processes holds
transfers.py   what they send each other
duration.py    seconds
remedies.py    what would make the run smaller
recompute.py   which layers are computed again in the backward pass
room.py        the memory that a process has
libraries.py   what the libraries of training take of it
make.py        all of it for a run
text.py        as a table
"""
