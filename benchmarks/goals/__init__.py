"""What `make bench` measures: one file for each family of measures, and what they share.

turns      several programs in processes of their own, one step each in turn
clock      the other end: a program waits for its turn, and says how long its step took
inputs     the model, its teacher, and rows of lengths as in alpaca
child      runs one program: luthier, the reference by hand, or one of the peers
rows       measures -> the table in docs/benchmarks.md

training   sft, QLoRA, dpo, rm, kto, gkd against the reference; share of the machine's matrix peak
answers    greedy decoding, rollouts; the programs that answer are in answer_programs
startup    CPU seconds before the work begins
growth     more rows, longer steps
"""
