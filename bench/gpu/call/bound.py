"""Runs a program that ends with its parent: `python bound.py PROGRAM ARGUMENTS`. Linux keeps the wish over exec."""

import ctypes
import os
import signal
import sys

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.execvp(sys.argv[1], sys.argv[1:])
