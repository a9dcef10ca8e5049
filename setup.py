"""Packages of the distribution; everything else stands in pyproject.toml.

The folder ``kernels/`` installs as ``lsep_kernels`` and has no ``__init__.py``: a top-level package called ``kernels``
would break installs beside Hugging Face's package of that name.
"""

from setuptools import Extension, setup

setup(
    packages=["lsep", "lsep.data", "lsep_kernels"],
    package_dir={"lsep": "lsep", "lsep_kernels": "kernels"},
    # A plain shared library, loaded with ctypes; without a C compiler the build goes on and Python does its work.
    ext_modules=[Extension("lsep._rows", ["csrc/rows.c"], extra_compile_args=["-O3"], optional=True)],
)
