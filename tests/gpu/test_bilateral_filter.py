from ops.test_bilateral_filter import *  # noqa: F403
