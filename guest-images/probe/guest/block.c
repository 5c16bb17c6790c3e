// Block requests (virtio 1.2 §5.2.6), always `depth` of them in flight.
//
// The disk holds a pattern: the word of 8 bytes at byte B is (B / 8 + 1) * PATTERN. Reads look at the first and the last
// word of what they got, with `check=1` at all; writes write the same pattern. So a device that returns rubbish, or does
// nothing, is not measured.

#include "virtio.h"

enum { SECTOR = 512, MAX_DEPTH = QUEUE_SIZE / 4 };
enum { READ = 0, WRITE = 1, FLUSH = 4 };
#define PATTERN 0x9e3779b97f4a7c15ul
#define F_FLUSH (1ul << 9)

static struct slot {
    struct {
        u32 type, reserved;
        u64 sector;
    } header;
    u64 begun;
    u64 byte;
    u8 *data;
    volatile u8 status;
} slots[MAX_DEPTH];

static struct device disk;
static u32 operation;
static int at_random;
static u64 blocks, next_block;

static const char *choose(const char *pattern)
{
    at_random = pattern[0] == 'r' && pattern[1] == 'a';
    if (equal(pattern, "randread") || equal(pattern, "read"))
        operation = READ;
    else if (equal(pattern, "randwrite") || equal(pattern, "write"))
        operation = WRITE;
    else if (equal(pattern, "flush"))
        operation = FLUSH;
    else
        return "there is randread, read, randwrite, write and flush";
    if (measure.depth == 0 || measure.depth > MAX_DEPTH)
        return "depth is not from 1 to 64";
    if (measure.size == 0 || measure.size % SECTOR || measure.size > (BUFFER_END - BUFFER_AREA) / measure.depth)
        return "size is no multiple of 512, or too much for the depth";
    return 0;
}

static void put_pattern(u64 *words, u64 byte, u64 size)
{
    u64 value = (byte / 8 + 1) * PATTERN;
    for (u64 i = 0; i < size / 8; i++, value += PATTERN)
        words[i] = value;
}

// The first byte of the disk that is wrong in what was read, or ~0.
static u64 wrong(const u64 *words, u64 byte, u64 size)
{
    u64 step = measure.check ? 1 : size / 8 - 1;
    for (u64 i = 0; i < size / 8; i += step)
        if (words[i] != (byte / 8 + i + 1) * PATTERN)
            return byte + i * 8;
    return ~0ul;
}

static void issue(struct slot *slot)
{
    u16 head = 3 * (slot - slots);
    u64 block = at_random ? rnd() % blocks : next_block++ % blocks;
    slot->byte = block * measure.size;
    slot->header.sector = operation == FLUSH ? 0 : slot->byte / SECTOR;
    slot->status = 0xff;
    if (operation == WRITE)
        put_pattern((u64 *)slot->data, slot->byte, measure.size);
    slot->begun = now();
    queue_fill(&disk.queues[0], head);
}

static void describe(struct slot *slot, u16 at)
{
    struct queue *q = &disk.queues[0];
    slot->header.type = operation;
    slot->data = (u8 *)(BUFFER_AREA + at / 3 * measure.size);
    queue_describe(q, at, &slot->header, sizeof slot->header, DESC_NEXT, operation == FLUSH ? at + 2 : at + 1);
    queue_describe(q, at + 1, slot->data, measure.size, operation == READ ? DESC_NEXT | DESC_WRITE : DESC_NEXT, at + 2);
    queue_describe(q, at + 2, (void *)&slot->status, 1, DESC_WRITE, 0);
}

// Looks at one completion; 0 when it is wrong, and was told.
static int finish(struct used_element element)
{
    u64 at = element.head / 3;
    if (element.head % 3 || at >= measure.depth) {
        fail_at("block", "a request was completed that was not made", element.head);
        return 0;
    }
    struct slot *slot = &slots[at];
    if (slot->status != 0) {
        fail_at("block", slot->status == 0xff ? "no status was written" : "the request failed", slot->byte);
        return 0;
    }
    latency_add(now() - slot->begun);
    if (operation != READ)
        return 1;
    u64 byte = element.length == measure.size + 1 ? wrong((u64 *)slot->data, slot->byte, measure.size) : slot->byte;
    if (byte != ~0ul)
        fail_at("block", "what was read is not what the disk holds", byte);
    return byte == ~0ul;
}

static int run(u64 ops)
{
    struct queue *q = &disk.queues[0];
    struct used_element element;
    u64 issued = 0;
    for (; issued < measure.depth && issued < ops; issued++)
        issue(&slots[issued]);
    queue_publish(q);
    for (u64 done = 0; done < ops;) {
        if (!queue_wait(&disk, q, "block"))
            return 0;
        while (queue_take(q, &element)) {
            if (!finish(element))
                return 0;
            done++;
            if (issued < ops)
                issue(&slots[element.head / 3]), issued++;
        }
        queue_publish(q);
    }
    return 1;
}

void block(const char *pattern)
{
    const char *why = choose(pattern);
    if (why) {
        fail("block", why);
        return;
    }
    if (!device_start(&disk, DEVICE_BLOCK, F_FLUSH, 1, "block"))
        return;
    blocks = (device_config(&disk, 0) | (u64)device_config(&disk, 4) << 32) / (measure.size / SECTOR);
    if (!blocks) {
        fail("block", "the disk is smaller than one request");
        return;
    }
    if (disk.queues[0].size < 3 * measure.depth) {
        fail("block", "the queue is too small for the depth");
        return;
    }
    for (u16 i = 0; i < measure.depth; i++)
        describe(&slots[i], 3 * i);
    if (!run(measure.warm))
        return;
    struct result result;
    if (!measured(&disk, run, &result))
        return;
    report("block", measure.ops, result.cycles);
    latency_print();
    report("kicks", result.kicks, result.cycles);
}
