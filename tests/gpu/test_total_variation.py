from ops.test_total_variation import *  # noqa: F403
