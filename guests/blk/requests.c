/* Every type of request, and requests that a device must refuse (virtio 1.2, 5.2.6). */

#include "blk.h"

enum { T_UNKNOWN = 0x7777, T_SCSI = 2 };

static uint8_t *data, *copy;

#define AREA (64 * SECTOR)

static void take_buffers(void)
{
    if (!data) {
        data = take_pages(AREA);
        copy = take_pages(AREA);
    }
}

static void test_id(void)
{
    uint8_t id[ID_BYTES + 1];
    uint32_t written = 0;

    memset(id, 0xFF, sizeof(id));
    check_equal("get-id", carry_out(T_GET_ID, 0, &(struct segment){id, ID_BYTES, true}, 1, &written), S_OK);
    check_equal("get-id-used-length", written, ID_BYTES + 1);
    id[ID_BYTES] = '\0';
    check("id-has-a-name", id[0] > ' ' && id[0] < 0x7F);
    if (!under_qemu()) /* QEMU writes only the name, without padding */
        check("id-is-padded", is_filled_with(id + strlen((char *)id), ID_BYTES - strlen((char *)id), 0));
    print("id %s\n", id);
}

static void test_refusals(void)
{
    uint64_t end = disk.sectors;

    check_equal("unknown-type", carry_out(T_UNKNOWN, 0, NULL, 0, NULL), S_UNSUPP);
    if (!under_qemu()) /* whose driver may once have been offered it */
        check_equal("scsi-command-type", carry_out(T_SCSI, 0, NULL, 0, NULL), S_UNSUPP);
    check_equal("last-sector", read_disk(end - 1, data, SECTOR), S_OK);
    check_equal("read-behind-the-end", read_disk(end, data, SECTOR), S_IOERR);
    check_equal("read-across-the-end", read_disk(end - 1, data, 2 * SECTOR), S_IOERR);
    check_equal("write-behind-the-end", write_disk(end, data, SECTOR), S_IOERR);
    check_equal("write-across-the-end", write_disk(end - 1, data, 2 * SECTOR), S_IOERR);
    check_equal("sector-whose-byte-overflows", read_disk(1ull << 55, data, SECTOR), S_IOERR);
    check_equal("largest-sector", read_disk(UINT64_MAX, data, SECTOR), S_IOERR);
    check_equal("read-of-half-a-sector", read_disk(SCRATCH, data, SECTOR / 2), S_IOERR);
    check_equal("write-of-a-sector-and-a-byte", write_disk(SCRATCH, data, SECTOR + 1), S_IOERR);
    check_equal("good-after-refusals", read_disk(KEPT, data, SECTOR), S_OK);
    check("data-after-refusals", is_pattern(data, KEPT, 1, PATTERN_HOST));
}

static uint8_t change_range(uint32_t type, uint64_t sector, uint32_t sectors, uint32_t flags)
{
    struct range range = {sector, sectors, flags};

    return carry_out(type, 0, &(struct segment){&range, sizeof(range), false}, 1, NULL);
}

/* Zero some sectors between others, and check all. */
static void test_zeroes(const char *name, const char *neighbours, uint32_t type, uint32_t flags)
{
    const uint64_t at = SCRATCH + 2048;
    unsigned whole = AREA / SECTOR, from = 8, count = 40;

    fill_pattern(data, at, whole, 4);
    write_disk(at, data, AREA);
    check_equal(name, change_range(type, at + from, count, flags), S_OK);
    read_disk(at, copy, AREA);
    if (type == T_WRITE_ZEROES) /* discarded sectors may read as anything */
        check("reads-zero", is_filled_with(copy + from * SECTOR, count * SECTOR, 0));
    check(neighbours, memcmp(copy, data, from * SECTOR) == 0 &&
                      memcmp(copy + (from + count) * SECTOR, data + (from + count) * SECTOR,
                             (whole - from - count) * SECTOR) == 0);
}

static void test_two_ranges(void)
{
    const uint64_t at = SCRATCH + 2048;
    struct range ranges[] = {{at + 3, 1, 0}, {at + 10, 2, 0}};
    uint32_t most = virtio_config(&disk.device, CONFIG_ZEROES_MAX + 4, 4);

    if (most < 2) {
        skip("two-ranges");
        return;
    }
    fill_pattern(data, at, AREA / SECTOR, 5);
    write_disk(at, data, AREA);
    check_equal("two-ranges",
                carry_out(T_WRITE_ZEROES, 0, &(struct segment){ranges, sizeof(ranges), false}, 1, NULL), S_OK);
    memset(data + 3 * SECTOR, 0, SECTOR);
    memset(data + 10 * SECTOR, 0, 2 * SECTOR);
    read_disk(at, copy, AREA);
    check("two-ranges-and-no-more", memcmp(data, copy, AREA) == 0);
}

static void test_ranges(void)
{
    uint32_t most = virtio_config(&disk.device, CONFIG_ZEROES_MAX, 4);
    uint8_t odd[sizeof(struct range) + 1] = {0};

    test_zeroes("write-zeroes", "write-zeroes-leaves-neighbours", T_WRITE_ZEROES, 0);
    test_zeroes("write-zeroes-unmap", "write-zeroes-unmap-leaves-neighbours", T_WRITE_ZEROES, RANGE_UNMAP);
    test_zeroes("discard", "discard-leaves-neighbours", T_DISCARD, 0);
    test_two_ranges();
    check_equal("discard-with-unmap", change_range(T_DISCARD, SCRATCH, 8, RANGE_UNMAP), S_UNSUPP);
    check_equal("discard-unknown-flag", change_range(T_DISCARD, SCRATCH, 8, 2), S_UNSUPP);
    check_equal("write-zeroes-unknown-flag", change_range(T_WRITE_ZEROES, SCRATCH, 8, 2), S_UNSUPP);
    check_equal("discard-across-the-end", change_range(T_DISCARD, disk.sectors - 1, 8, 0), S_IOERR);
    check_equal("write-zeroes-behind-the-end", change_range(T_WRITE_ZEROES, disk.sectors, 1, 0), S_IOERR);
    check_equal("write-zeroes-of-an-overflow", change_range(T_WRITE_ZEROES, UINT64_MAX, 2, 0), S_IOERR);
    check_equal("write-zeroes-of-too-much", change_range(T_WRITE_ZEROES, 0, most + 1, 0), S_IOERR);
    if (under_qemu()) /* which wants a reset after the first of these, and is content with the second */
        return;
    check_equal("half-a-range", carry_out(T_DISCARD, 0, &(struct segment){odd, 8, false}, 1, NULL), S_IOERR);
    check_equal("range-and-a-byte",
                carry_out(T_WRITE_ZEROES, 0, &(struct segment){odd, sizeof(odd), false}, 1, NULL), S_IOERR);
}

static void test_flush(void)
{
    uint32_t written = 0;

    check_equal("flush", carry_out(T_FLUSH, 0, NULL, 0, &written), S_OK);
    check_equal("flush-used-length", written, 1);
}

/* A driver without features cannot flush, so its writes must be safe at once. */
static void test_without_features(bool legacy)
{
    if (!start_disk(&(struct way){.legacy = legacy, .featureless = true}))
        return;
    fill_pattern(data, SCRATCH, 8, 6);
    check_equal("write-through", write_disk(SCRATCH, data, 8 * SECTOR), S_OK);
    check_equal("read-without-features", read_disk(SCRATCH, copy, 8 * SECTOR), S_OK);
    check("data-without-features", memcmp(data, copy, 8 * SECTOR) == 0);
    if (!under_qemu())
        check_equal("discard-without-features", change_range(T_DISCARD, SCRATCH, 8, 0), S_UNSUPP);
}

void test_requests(const char *name, bool legacy)
{
    check_group(name);
    take_buffers();
    if (!start_disk(&(struct way){.legacy = legacy}))
        return;
    test_id();
    test_refusals();
    test_flush();
    if (disk.device.features & F_DISCARD && disk.device.features & F_WRITE_ZEROES)
        test_ranges();
    else
        skip("ranges");
    test_without_features(legacy);
}

void test_read_only(const char *name, bool legacy)
{
    check_group(name);
    take_buffers();
    if (!start_disk(&(struct way){.legacy = legacy}))
        return;
    check("says-read-only", disk.device.features & F_READ_ONLY);
    memset(data, 0x55, SECTOR);
    check_equal("write", write_disk(KEPT, data, SECTOR), S_IOERR);
    if (disk.device.features & F_DISCARD) {
        check_equal("discard", change_range(T_DISCARD, KEPT, 8, 0), S_IOERR);
        check_equal("write-zeroes", change_range(T_WRITE_ZEROES, KEPT, 8, 0), S_IOERR);
    }
    check_equal("read", read_disk(KEPT, data, AREA), S_OK);
    check("reads-what-the-host-wrote", is_pattern(data, KEPT, AREA / SECTOR, PATTERN_HOST));
    check_equal("get-id", carry_out(T_GET_ID, 0, &(struct segment){data, ID_BYTES, true}, 1, NULL), S_OK);
}

void write_final(void)
{
    uint64_t sector = FINAL;
    unsigned failed = 0;

    check_group("final");
    if (!start_disk(&(struct way){.indirect = true, .event_index = true, .legacy = !has_interface(false)}))
        return;
    for (; sector < FINAL_END; sector += AREA / SECTOR) {
        fill_pattern(data, sector, AREA / SECTOR, PATTERN_FINAL);
        failed += write_disk(sector, data, AREA) != S_OK;
    }
    check_equal("writes", failed, 0);
    check_equal("flush", carry_out(T_FLUSH, 0, NULL, 0, NULL), S_OK);
}
