"""Where the processes of a run are started: by torchrun, by Ray, as a child of this one, and what a failed one left.

torchrun.py          one process per accelerator
ray.py               the processes of a run on the machines of Ray; ray_worker.py is what each of them does
child.py             a process that ends with the one that started it
run_files.py         the run file of such a process, without secrets
processes.py         what a run may not do because it has several processes
failed_processes.py  which process failed first, and where its log is
"""
