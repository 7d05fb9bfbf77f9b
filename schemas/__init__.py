"""What crosses a boundary, as msgspec Structs: options, jobs, frames, records.

Every other module of the project decodes to one of these at its edge and trusts it inside.
This package depends on msgspec alone, so that any worker environment can import it.
"""
