from ops.test_pgd_step import *  # noqa: F403
