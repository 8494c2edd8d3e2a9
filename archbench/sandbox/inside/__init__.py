"""What runs inside the sandbox: standard library only, and only each other.

These files are not imported there: their text is sent to the sandboxed interpreter, which sees no files but its own
standard library's (see `archbench.sandbox.zygote`).
"""
