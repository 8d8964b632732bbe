"The how-to notebooks do what they say, at the smallest scale."

import json
import os
import re
import subprocess
import textwrap

import pytest

from tests.conftest import REPO, papermill


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPO / "nbs").glob("howto_*.ipynb")))
def test_a_howto_runs(tmp_path, name):
    done = papermill(tmp_path, name, "--cwd", str(REPO / "nbs"))
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_cluster_script_for_slurm_waits_for_its_nodes_and_keeps_their_cores(tmp_path):
    notebook = json.loads((REPO / "nbs/howto_cluster.ipynb").read_text())
    text = "".join("".join(c["source"]) for c in notebook["cells"])
    script = textwrap.dedent(re.search(r"    #!/bin/bash\n(    .*\n)+", text)[0])
    assert "SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in script and "sleep 20" not in script
    commands = dict(
        scontrol="echo first; echo second",
        srun='echo "srun $SRUN_CPUS_PER_TASK $*" >> said',
        sleep="exit",
        make='echo "make $*" >> said',
        ray="n=$(wc -l < asked); echo >> asked; seq -f ' 1 node_%g' $((n / 2))",  # one more is there each second time
    )
    (tmp_path / "asked").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, does in commands.items():
        place = tmp_path / (".venv/bin" if name == "ray" else "") / name
        place.write_text(f"#!/bin/bash\n{does}\n")
        place.chmod(0o755)
    environment = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_CPUS_PER_TASK="16")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "asked").read_text()) == 9  # until four are there, and then no more
    head, workers, paper = (tmp_path / "said").read_text().splitlines()
    assert head.startswith("srun 16 ") and "--head" in head and "-w first" in head
    assert workers.startswith("srun 16 ") and "--exclude=first" in workers
    assert paper.startswith("make paper") and "ADDRESS=first:6379" in paper
