// The probe at ring 3: says that it is there, then does what the kernel command line asks for, word by word, in order.
// The words are described in guest-images/README.md. All numbers are unsigned, decimal or 0x-hexadecimal.

#include "probe.h"

enum { KIND_PVH = 1, KIND_LINUX = 2 };
enum { SERVICE_SPIN, SERVICE_HALT, SERVICE_TRIPLE, SERVICE_CMPXCHG16B, SERVICE_XRSTOR, SERVICE_INT3,
       SERVICE_NOWHERE };
enum { COM1 = 0x3f8, COM1_LSR = COM1 + 5, I8042_COMMAND = 0x64, I8042_RESET = 0xfe };
enum { CMDLINE_MAX = 2048, WORD_MAX = 128 };
#define MAPPED (4ul << 30) // what entry.S maps

static inline void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u64 ask_ring0(u64 service, u64 argument)
{
    register u64 magic __asm__("r11") = 0x5e41c0de; // MAGIC in entry.S
    __asm__ volatile("ud2" : "+a"(service), "+D"(argument) : "r"(magic) : "rcx", "rdx", "memory");
    return service;
}

void print(const char *text)
{
    while (*text)
        out8(COM1, *text++);
}

static void print_hex(u64 value)
{
    print("0x");
    int shift = 60;
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        out8(COM1, "0123456789abcdef"[value >> shift & 15]);
}

void print_number(u64 value)
{
    char digits[21], *p = digits + 20;
    *p = 0;
    do
        *--p = '0' + value % 10;
    while (value /= 10);
    print(p);
}

static void __attribute__((noreturn)) reset(void)
{
    out8(I8042_COMMAND, I8042_RESET);
    for (;;)
        ask_ring0(SERVICE_HALT, 0);
}

// An exception that nobody asked for: told, and the end.
__attribute__((noreturn, used)) void probe_exception(u64 vector, u64 error, u64 rip, u64 cr2)
{
    print("probe: exception ");
    print_number(vector);
    print(" error ");
    print_hex(error);
    print(" at ");
    print_hex(rip);
    print(" address ");
    print_hex(cr2);
    print("\n");
    reset();
}

int equal(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

// Reads a number and moves the pointer behind it; 0 when there is none.
u64 number(const char **text)
{
    const char *p = *text;
    u64 value = 0, base = 10;
    if (p[0] == '0' && p[1] == 'x')
        base = 16, p += 2;
    for (;; p++) {
        u64 digit = 99;
        if (*p >= '0' && *p <= '9')
            digit = *p - '0';
        else if (*p >= 'a' && *p <= 'f')
            digit = *p - 'a' + 10;
        if (digit >= base)
            break;
        value = value * base + digit;
    }
    *text = p;
    return value;
}

// "probe: NAME COUNT in TSC cycles"
void report(const char *name, u64 count, u64 cycles)
{
    print("probe: ");
    print(name);
    print(" ");
    print_number(count);
    print(" in ");
    print_number(cycles);
    print(" cycles\n");
}

// N instructions at ring 3, two to a round.
static void spin(u64 n)
{
    u64 rounds = n / 2, start = now();
    if (rounds)
        __asm__ volatile("1: dec %0\n jnz 1b" : "+r"(rounds));
    report("spin", n, now() - start);
}

static void ring0(u64 n)
{
    u64 start = now();
    ask_ring0(SERVICE_SPIN, n);
    report("ring0", n, now() - start);
}

static void cpuid(u32 leaf, u32 subleaf, u32 r[4])
{
    __asm__ volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(subleaf));
}

// Executes one instruction at ring 0 that an emulator of ring 0 may lack; the host sees the end if it does.
static void instruction(const char *name)
{
    u32 r[4];
    u64 service;
    cpuid(1, 0, r);
    int there = 1;
    if (equal(name, "cmpxchg16b"))
        service = SERVICE_CMPXCHG16B, there = r[2] >> 13 & 1;
    else if (equal(name, "xrstor"))
        service = SERVICE_XRSTOR, there = r[2] >> 26 & 1;
    else if (equal(name, "int3"))
        service = SERVICE_INT3;
    else {
        print("probe: no such insn\n");
        return;
    }
    print("probe: insn ");
    print(name);
    print(there && ask_ring0(service, 0) == 0 ? " ok\n" : " absent\n");
}

static void print_cpuid(const char *text)
{
    u32 r[4], leaf = number(&text), subleaf = *text == '.' ? (text++, number(&text)) : 0;
    cpuid(leaf, subleaf, r);
    print("probe: cpuid");
    for (int i = 0; i < 4; i++) {
        print(" ");
        print_hex(r[i]);
    }
    print("\n");
}

static void io(u16 port, u64 n)
{
    u64 start = now();
    for (u64 i = 0; i < n; i++)
        out8(port, 0);
    report("io", n, now() - start);
}

// Writes one byte to every page of N MiB from 16 MiB on, as far as memory is mapped below the MMIO windows.
static void touch(u64 mebibytes)
{
    u64 first = 16ul << 20, last = mebibytes > 3056 ? 3072ul << 20 : first + (mebibytes << 20), start = now();
    for (u64 page = first; page < last; page += 4096)
        *(volatile u8 *)page = 1;
    report("touch", (last - first) >> 12, now() - start);
}

// What lies at an address that is not mapped (4 GiB and above) is an exception.
static void peek(const char *text)
{
    u64 address = number(&text) & ~3ul;
    u32 value = *(volatile u32 *)address;
    print("probe: peek ");
    print_hex(value);
    print("\n");
}

static void poke(const char *text)
{
    u64 address = number(&text) & ~3ul;
    u32 value = *text == ',' ? (text++, number(&text)) : 0;
    *(volatile u32 *)address = value;
}

// Gives back N bytes of serial input.
static void echo(u64 n)
{
    while (n) {
        if (!(in8(COM1_LSR) & 1)) {
            __asm__ volatile("pause");
            continue;
        }
        out8(COM1, in8(COM1));
        n--;
    }
}

static u64 seed = 1;

u64 rnd(void) // xorshift64*
{
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545f4914f6cdd1dul;
}

// A value that is often on the edge of something.
static u32 odd_value(void)
{
    u64 r = rnd();
    switch (r & 7) {
    case 0: return 0;
    case 1: return ~0u;
    case 2: return 1u << (r >> 8 & 31);
    case 3: return r >> 8 & 15;
    case 4: return 0x800000 + (r >> 8 & 0x3fffff);
    default: return r >> 32;
    }
}

enum { RING_AREA = 8 << 20, RING_SIZE = 1 << 20 }; // in every guest: the smallest has 16 MiB

// Fills a queue's memory: descriptors that often point into memory, with often small lengths, flags and links.
static void fill_rings(void)
{
    u32 *p = (u32 *)(u64)RING_AREA;
    for (int i = 0; i < 4096; i += 4) {
        u64 r = rnd();
        p[i] = r & 1 ? odd_value() : RING_AREA + (rnd() & (RING_SIZE - 1));
        p[i + 1] = r & 2 || (r & 0x700) ? 0 : odd_value();
        p[i + 2] = r & 4 ? odd_value() : rnd() & 0xfff;
        p[i + 3] = (rnd() & 7) | (rnd() & (r & 8 ? 0xffff : 0xf)) << 16;
    }
    for (int i = 4096; i < 12288; i++)
        p[i] = odd_value() & (rnd() & 1 ? 0x000f000f : ~0u);
}

// Takes a device through its initialisation with rings of rubbish, so that it gets as far as reading them.
static void start_with_rubbish(volatile u8 *window)
{
#define REG(offset) (*(volatile u32 *)(window + (offset)))
    REG(0x70) = 0; // Status: reset, ACKNOWLEDGE | DRIVER
    REG(0x70) = 3;
    for (u32 half = 0; half < 2; half++) { // take (most of) what is offered
        REG(0x14) = half;
        u32 offered = REG(0x10);
        REG(0x24) = half;
        REG(0x20) = half == 0 && (rnd() & 1) ? offered & rnd() : offered;
    }
    REG(0x70) = 11; // FEATURES_OK
    for (u32 queue = 0; queue < 3; queue++) {
        REG(0x30) = queue;
        REG(0x38) = rnd() & 7 ? 1u << (rnd() & 7) : odd_value();
        for (u32 offset = 0x80; offset <= 0xa4; offset += 4)
            REG(offset) = offset & 4 ? 0 : RING_AREA + (offset & 0x20 ? 0x8000 : offset & 0x10 ? 0x4000 : 0);
        if ((rnd() & 15) == 0)
            REG(0x80 + (rnd() & 0x24)) = odd_value();
        REG(0x44) = 1;
    }
    REG(0x70) = 15; // DRIVER_OK
    for (u32 queue = 0; queue < 3; queue++)
        REG(0x50) = queue;
#undef REG
}

// N steps of rubbish over all virtio-mmio windows: most of them one access of any width to any register.
static void garbage(u64 n)
{
    for (u64 i = 0; i < n; i++) {
        u64 r = rnd();
        volatile u8 *window = (volatile u8 *)(MMIO_BASE + (r % MMIO_WINDOWS) * MMIO_WINDOW);
        u32 offset = r >> 8 & (r & 0x1000000 ? 0xfff : 0x1ff);
        switch (r >> 32 & 31) {
        case 0: fill_rings(); break;
        case 1: start_with_rubbish(window); break;
        case 2: *(volatile u8 *)(window + offset) = odd_value(); break;
        case 3: *(volatile u16 *)(window + (offset & ~1u)) = odd_value(); break;
        case 4: *(volatile u64 *)(window + (offset & ~7u)) = rnd(); break;
        case 5: (void)*(volatile u8 *)(window + offset); break;
        case 6: (void)*(volatile u32 *)(window + (offset & ~3u)); break;
        case 7: case 8: case 9: *(volatile u32 *)(window + 0x50) = r >> 40 & 3; break;
        default: *(volatile u32 *)(window + (offset & ~3u)) = odd_value();
        }
    }
    print("probe: garbage done\n");
}

static void leave(const char *how)
{
    if (equal(how, "halt")) {
        print("probe: halt\n");
        ask_ring0(SERVICE_HALT, 0);
    }
    if (equal(how, "triple"))
        ask_ring0(SERVICE_TRIPLE, 0);
    if (equal(how, "nowhere"))
        ask_ring0(SERVICE_NOWHERE, 0);
    if (equal(how, "poweroff"))
        out8(SLEEP_CONTROL_PORT, SLEEP_CONTROL_S5);
    if (equal(how, "spin")) // busy for good, for tests that end a guest which does not listen
        for (;;)
            __asm__ volatile("pause");
    if (!equal(how, "reset"))
        print("probe: no such exit\n");
    reset();
}

// Does one word of the command line, KEY or KEY=VALUE; words of others are passed over.
static void obey(const char *key, const char *value)
{
    static u16 port = 0x80;
    const char *v = value;
    if (equal(key, "spin")) spin(number(&v));
    else if (equal(key, "ring0")) ring0(number(&v));
    else if (equal(key, "insn")) instruction(v);
    else if (equal(key, "print")) { print(v); print("\n"); }
    else if (equal(key, "echo")) echo(number(&v));
    else if (equal(key, "cpuid")) print_cpuid(v);
    else if (equal(key, "port")) port = number(&v);
    else if (equal(key, "io")) io(port, number(&v));
    else if (equal(key, "mark")) out8(MARK_PORT, number(&v));
    else if (equal(key, "touch")) touch(number(&v));
    else if (equal(key, "peek")) peek(v);
    else if (equal(key, "poke")) poke(v);
    else if (equal(key, "seed")) seed = number(&v) | 1;
    else if (equal(key, "garbage")) garbage(number(&v));
    else if (equal(key, "block")) block(v);
    else if (equal(key, "net")) net(v);
    else if (equal(key, "vsock")) vsock(v);
    else if (equal(key, "exit")) leave(v);
    else set_measure(key, number(&v));
}

const char *command_line;

// hvm_start_info: cmdline_paddr at 24. boot_params: cmd_line_ptr at 0x228, its upper half at 0xc8.
static const char *find_command_line(u64 pointer, u64 kind)
{
    u64 address = kind == KIND_PVH ? *(u64 *)(pointer + 24) : *(u32 *)(pointer + 0x228) | (u64) * (u32 *)(pointer + 0xc8) << 32;
    return address && address < MAPPED - CMDLINE_MAX ? (const char *)address : "";
}

__attribute__((noreturn, used)) void probe_main(u64 pointer, u64 kind)
{
    print("probe: ready\n");
    const char *p = command_line = find_command_line(pointer, kind), *end = p + CMDLINE_MAX;
    while (p < end && *p) {
        char word[WORD_MAX];
        u64 length = 0, equals = WORD_MAX - 1;
        for (; p < end && *p && *p != ' '; p++) {
            if (length >= WORD_MAX - 1)
                continue; // too long: its head is used
            if (*p == '=' && equals == WORD_MAX - 1)
                equals = length;
            word[length++] = *p;
        }
        word[length] = 0;
        word[equals] = 0;
        obey(word, equals < length ? word + equals + 1 : word + length);
        while (p < end && *p == ' ')
            p++;
    }
    print("probe: done\n");
    leave("reset");
    reset();
}
