"The how-to notebooks do what they say, at the smallest scale."

import pytest

from tests.conftest import REPO, papermill


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPO / "nbs").glob("howto_*.ipynb")))
def test_a_howto_runs(tmp_path, name):
    done = papermill(tmp_path, name, "--cwd", str(REPO / "nbs"))
    assert done.returncode == 0, done.stderr[-3000:]
