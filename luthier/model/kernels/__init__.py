"""Autograd functions, modules and classes that need torch or transformers when they are imported.

Everything else in the package imports torch inside functions, so import a kernel inside the function that uses it.
"""
