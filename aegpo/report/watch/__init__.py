"""What the runs of an experiment say while they go on: read over and over, changed never.

`standing` says how each run stands, `folder` reads all of an experiment, `page` shows it. Another process may be
writing what is read, so that its last line may be half there.
"""
