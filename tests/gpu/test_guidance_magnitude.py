from ops.test_guidance_magnitude import *  # noqa: F403
