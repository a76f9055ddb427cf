class RequestError(RuntimeError):
    """An error of one request."""
