"""What the owner of a device allows: the policy, admission, the account of privacy, usage."""
