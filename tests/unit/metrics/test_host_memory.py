from a2tgpo.metrics.host_memory import resident_bytes, return_free_memory

MIB = 2**20


def test_memory_that_was_freed_between_blocks_that_stay_goes_back_to_the_system():
    before = resident_bytes()
    large, stay = [], []
    for _ in range(2000):
        large.append(bytearray(64 * 1024))  # below what glibc takes from the system by itself
        stay.append(bytearray(1024))
    assert resident_bytes() - before > 110 * MIB
    large.clear()
    assert resident_bytes() - before > 90 * MIB, "glibc keeps it"
    return_free_memory()
    assert resident_bytes() - before < 30 * MIB
    assert len(stay) == 2000
