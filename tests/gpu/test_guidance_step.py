from ops.test_guidance_step import *  # noqa: F403
