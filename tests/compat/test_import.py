"""``dq.compat`` is there when it is asked for, and needs none of the libraries that it stands in for."""

import subprocess
import sys

import pytest

import deqfast as dq

CODE = """
import sys
sys.modules.update(dict.fromkeys(("scipy", "torchdeq", "xitorch", "jaxopt", "jax"), None))  # importing one would raise
import deqfast as dq
assert "deqfast.compat" not in sys.modules
for name in dq.compat.__all__:
    assert getattr(dq.compat, name)
import numpy
print(dq.compat.scipy.anderson(lambda x: 2 - x, numpy.zeros(3)).round(4))
"""


def test_imported_when_asked_for_and_without_the_others():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[2. 2. 2.]\n"


def test_nothing_else_is_made_up():
    with pytest.raises(AttributeError, match="has no attribute 'kompat'"):
        _ = dq.kompat  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["jaxopt", "locuslab", "scipy", "torchdeq", "xitorch"])
def test_everything_public_has_a_docstring(name):
    module = getattr(dq.compat, name)
    assert module.__doc__ and "Source" in module.__doc__
    assert all(getattr(module, public).__doc__ for public in module.__all__)
