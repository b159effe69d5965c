"""The SQL registry: tenants, keys, tasks, versions, routes, usage and the audit log.

The words that a command shows stand here, apart from all that imports a database.
"""

DEFAULT_TENANT = "default"
SCOPES = ("generate", "deploy", "admin")
