"""Says aloud what this run could not show for want of hardware, so that a green run is not misread."""

import pytest


def test_reports_what_was_skipped_for_want_of_a_gpu(tests_wanting_a_gpu: list[str], gpu_is_here: bool) -> None:
    if gpu_is_here or not tests_wanting_a_gpu:
        return
    files = sorted({nodeid.split("::")[0] for nodeid in tests_wanting_a_gpu})
    pytest.skip(f"no GPU: {len(tests_wanting_a_gpu)} tests did not run, of {', '.join(files)}")
