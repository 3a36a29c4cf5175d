"""All code that knows Ray: the graph, model actors, decode tasks, frame streams, attempts and metrics.

Words of this package:

unit        one row of the manifest: a video, clip or image set with its prompts; it gets one output row
block       `ray.actors.batch_units` units that Ray Data gives a model actor in one call
start       a unit enters the model; the count of its starts is its number of attempts
permission  the answer of `Attempts` that a unit may start; the start counts from then on
end         a unit has its row; a start never ends if the model's process dies first
suspect     a unit with a start that never ended: its process died; it runs alone in the model
given up    a suspect that was started `run.max_attempts` times: it gets an error row
draining    no unit may start any more; units without a row stay open, for the next run of the same command
message     what a decode task sends at once: a list of frame batches, or the error that ended them
"""
