"""The shipped layouts of data: each module here registers those that it reads (see `medsight.data.registry`)."""
