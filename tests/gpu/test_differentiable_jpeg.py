from ops.test_differentiable_jpeg import *  # noqa: F403
