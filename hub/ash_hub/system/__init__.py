"""The files of this machine.

files    files replaced whole
"""
