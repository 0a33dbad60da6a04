"""Several samples in one row: best-fit packing (sft), blocks (pt), mismatched pairs (kto)."""
