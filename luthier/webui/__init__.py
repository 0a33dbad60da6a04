"""The board: pages in a browser to start, watch, compare and try runs.

A run is a folder and a process of its own. Everything that a page shows is read from the files of that folder, so any
number of boards may come and go while runs go on.
"""
