"""Files that several processes may write."""

import subprocess
import sys

import pytest

from configs import ConfigError
from configs.files import only_one


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_one_goes_on(tmp_path):
    holder = """
import sys, time
from configs.files import only_one
with only_one(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run holds"), only_one(tmp_path, seconds=0.3):
            pass
        process.kill()
    with only_one(tmp_path, seconds=5):  # the lock goes with its process
        pass
    with only_one(tmp_path):
        pass
