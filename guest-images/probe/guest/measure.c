#include "virtio.h"

struct measure measure = { .depth = 32, .size = 4096, .ops = 10000, .warm = 1000, .check = 0,
                           .patience = 30000000000ul }; // some ten seconds

void set_measure(const char *key, u64 value)
{
    u64 *field = equal(key, "depth") ? &measure.depth
                 : equal(key, "size") ? &measure.size
                 : equal(key, "ops") ? &measure.ops
                 : equal(key, "warm") ? &measure.warm
                 : equal(key, "check") ? &measure.check
                 : equal(key, "patience") ? &measure.patience : 0;
    if (field)
        *field = value;
}

// Latencies by their five highest bits behind the first: within 1.6 % of the truth.
enum { SUB_BITS = 5, BUCKETS = 64 << SUB_BITS };
static u32 latencies[BUCKETS];
static u64 latency_max;

static void latency_reset(void)
{
    fill(latencies, 0, sizeof latencies);
    latency_max = 0;
}

void latency_add(u64 cycles)
{
    u32 shift = cycles >> (SUB_BITS + 1) ? 63 - SUB_BITS - __builtin_clzl(cycles) : 0;
    latencies[(shift << SUB_BITS) + (cycles >> shift)]++;
    if (cycles > latency_max)
        latency_max = cycles;
}

// The middle of a bucket, in cycles; no more than the longest latency.
static u64 middle(u64 bucket)
{
    u64 shift = bucket >> (SUB_BITS + 1) ? (bucket >> SUB_BITS) - 1 : 0;
    u64 cycles = ((bucket - (shift << SUB_BITS)) << shift) + ((1ul << shift) >> 1);
    return cycles < latency_max ? cycles : latency_max;
}

// Cycles have 20 digits at most and counts 10, so that no line is longer than the 512 bytes that the host takes.
enum { BUCKETS_A_LINE = 12 };

void latency_print(void)
{
    u64 printed = 0;
    for (u64 i = 0; i < BUCKETS; i++) {
        if (!latencies[i])
            continue;
        if (printed++ % BUCKETS_A_LINE == 0)
            print(printed > 1 ? "\nprobe: latencies" : "probe: latencies");
        print(" ");
        print_number(middle(i));
        print(":");
        print_number(latencies[i]);
    }
    if (printed)
        print("\n");
}

static u64 kicks(const struct device *device)
{
    u64 sum = 0;
    for (u32 i = 0; i < QUEUES; i++)
        sum += device->queues[i].kicks;
    return sum;
}

int measured(const struct device *device, int (*run)(u64 ops), struct result *result)
{
    latency_reset();
    result->kicks = kicks(device);
    print("probe: begins\n"); // the host begins to watch
    u64 start = now();
    int good = run(measure.ops);
    result->cycles = now() - start;
    print("probe: ends\n");
    result->kicks = kicks(device) - result->kicks;
    return good;
}

void fail(const char *what, const char *why)
{
    print("probe: ");
    print(what);
    print(" error: ");
    print(why);
    print("\n");
}

void fail_at(const char *what, const char *why, u64 where)
{
    print("probe: ");
    print(what);
    print(" error: ");
    print(why);
    print(" at ");
    print_number(where);
    print("\n");
}
