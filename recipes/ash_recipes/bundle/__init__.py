"""The runner as a bundle: its Python, libraries and loader in one folder that runs in any Linux root.

contents.py   what is in it: the standard library, distributions, shared libraries, licences
loader.py     a loader that reads no file of the root it runs in
build.py      the folder, the same bytes for the same input
__main__.py   the command

It is part of no bundle itself. Standard library and `packaging` only.
"""
