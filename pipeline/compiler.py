"""What torch.compile needs of a machine, beside torch.

It does not know what is compiled.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


def lacking(device: str) -> str:
    """What inductor, which writes C++ for a CPU, does not find here, and what to do; "" where it finds all.

    device: its type, as "cpu".
    """
    if device != "cpu":
        return ""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which((shlex.split(compiler) or [""])[0]):  # as in CXX="ccache g++"
        return f"kernels for a CPU need a C++ compiler, and there is no {compiler}; install it, or do not compile"
    if not (headers := Path(sysconfig.get_path("include"))).joinpath("Python.h").is_file():
        return f"kernels for a CPU need Python's headers, and {headers} has none; install them, or do not compile"
    return ""
