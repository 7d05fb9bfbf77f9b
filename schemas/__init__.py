"""All data that crosses a process or file boundary, as msgspec Structs: options, jobs, frames, records.

Other packages decode to these at their edges and trust them inside. This package depends on msgspec alone,
so that every worker environment can import it.
"""
