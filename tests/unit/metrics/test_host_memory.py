import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
# A separate process runs this code. In this process the blocks would reuse memory that earlier tests freed.
CODE = """
import json
from a2tgpo.metrics.host_memory import resident_bytes, return_free_memory

before, large, stay = resident_bytes(), [], []
for _ in range(2000):
    large.append(bytearray(2**16))  # below what glibc takes from the system by itself
    stay.append(bytearray(2**10))
seen = [resident_bytes() - before]
large.clear()
seen.append(resident_bytes() - before)
return_free_memory()
seen.append(resident_bytes() - before)
print(json.dumps([size / 2**20 for size in seen]))
"""


def test_memory_that_was_freed_between_blocks_that_stay_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    taken, freed, returned = json.loads(done.stdout)
    assert taken > 120
    assert freed > 110, "glibc keeps it"
    assert returned < 20
