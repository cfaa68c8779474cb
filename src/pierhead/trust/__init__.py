"""Who vouches for a model: signatures, attestations, and the policy that asks for them."""
