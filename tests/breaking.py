"Works that break on purpose. Their processes import nothing else, so that they are killed at work and not while they begin."

import os
import sys
import time


def careless(folder):
    "A work that is not as the library's: it writes in place, and begins again where it was by adding to what is there."
    (folder / "mine").mkdir(parents=True, exist_ok=True)
    with open(folder / "mine" / "results.csv", "a") as file:
        for k in range(20):
            file.write(f"{k}\n")
            file.flush()
            time.sleep(0.02)


def fragile(folder, end):
    "A work that fails at its first restart and succeeds at the next, and leaves the same as if nothing had been."
    lives = folder / "lives"
    folder.mkdir(parents=True, exist_ok=True)
    lives.write_text(lives.read_text() + "." if lives.exists() else ".")
    time.sleep(1)
    if len(lives.read_text()) == 2:
        print("something went wrong", file=sys.stderr)
        end()
    (folder / "results.csv").write_text("whole")


def hopeless(folder):
    "A work that succeeds where nobody can kill it, and nowhere else."
    if folder.name != "unbroken":
        raise ValueError("never")
    time.sleep(1)  # so the others have failed when they should be killed


def slain():
    "As by the system, when there is no memory left."
    os.kill(os.getpid(), 9)
