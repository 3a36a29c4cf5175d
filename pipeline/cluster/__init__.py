"""All code that knows Ray: the graph, model actors, decode tasks, frame streams, attempts and metrics."""
