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
static u64 latency_count, latency_max;

static void latency_reset(void)
{
    fill(latencies, 0, sizeof latencies);
    latency_count = latency_max = 0;
}

void latency_add(u64 cycles)
{
    u32 shift = cycles >> (SUB_BITS + 1) ? 63 - SUB_BITS - __builtin_clzl(cycles) : 0;
    latencies[(shift << SUB_BITS) + (cycles >> shift)]++;
    latency_count++;
    if (cycles > latency_max)
        latency_max = cycles;
}

// The middle of the bucket below which PER_MILLE of all latencies lie.
static u64 latency_at(u64 per_mille)
{
    u64 left = latency_count * per_mille / 1000;
    for (u64 i = 0; i < BUCKETS; i++) {
        if (left < latencies[i]) {
            u64 shift = i >> (SUB_BITS + 1) ? (i >> SUB_BITS) - 1 : 0;
            u64 middle = ((i - (shift << SUB_BITS)) << shift) + ((1ul << shift) >> 1);
            return middle < latency_max ? middle : latency_max;
        }
        left -= latencies[i];
    }
    return latency_max;
}

void latency_print(void)
{
    static const struct { const char *name; u64 per_mille; } wanted[] = {
        { " p50 ", 500 }, { " p90 ", 900 }, { " p99 ", 990 }, { " p999 ", 999 },
    };
    print("probe: latency");
    for (u64 i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        print(wanted[i].name);
        print_number(latency_at(wanted[i].per_mille));
    }
    print(" max ");
    print_number(latency_max);
    print(" cycles\n");
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
