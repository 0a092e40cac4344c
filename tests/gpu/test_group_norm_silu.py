from ops.test_group_norm_silu import *  # noqa: F403
