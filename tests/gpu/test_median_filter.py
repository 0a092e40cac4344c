from ops.test_median_filter import *  # noqa: F403
