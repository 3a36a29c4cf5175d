from hypothesis import settings

# The same examples in every run: a failure here is always the change's, never the draw's.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")
