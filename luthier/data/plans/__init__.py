"""The row plans: what a row is for each kind of example. One plan per file; a stage picks one."""
