"""Repositories of a hub as sources, through huggingface_hub (extra `hub`), which is imported when an id is met.

`ids` reads them, `selection` says which files a checkpoint needs, `transfer` brings these into huggingface_hub's
`cache`, `snapshot` does all of it, `arriving` does it during a conversion, for which `headers` come first, and `faults`
says what went wrong.
"""
