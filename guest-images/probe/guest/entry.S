# From either entry to ring 3 in as few ring-0 instructions as there can be: hosts that emulate ring 0 (pagetable KVM)
# do about one a microsecond, so page tables, GDT, IDT and TSS are data, made by the assembler, not by code.
#
#   pvh_start  PVH: 32-bit protected mode without paging, %ebx -> struct hvm_start_info
#   _start     64-bit entry of the Linux boot protocol: long mode, %rsi -> struct boot_params
#
# Both end in probe_main(pointer, kind) at ring 3 with all ports and interrupts off. From there, `ud2` with MAGIC in %r11
# asks ring 0 for what ring 3 may not do, see `service`. (Pagetable KVM delivers exceptions, but not `int n`, of ring 3.)

#define KERNEL_CS 0x10
#define USER_DS   0x23
#define USER_CS   0x2b
#define TSS_SEL   0x30
#define KIND_PVH  1
#define KIND_LINUX 2
#define MAGIC 0x5e41c0de
#define NOWHERE 0xe8000000      /* between guest memory and the interrupt controllers, behind the device windows */

#ifndef LONG64
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_start

.section .text.start, "ax"
.code32
pvh_start:
    mov $pml4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x20, %eax                  # PAE
    mov %eax, %cr4
    mov $0xc0000080, %ecx           # EFER
    rdmsr
    or $0x100, %eax                 # LME
    wrmsr
    mov %cr0, %eax
    or $0x80000000, %eax            # PG
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $KERNEL_CS, $1f
.code64
1:  mov %ebx, %edi
    mov $KIND_PVH, %esi
    jmp to_ring3
#endif

.section .text.start, "ax"
.code64
.globl _start
_start:
    mov %rsi, %rdi
    mov $KIND_LINUX, %esi
    mov $pml4, %eax
    mov %rax, %cr3
    lgdt gdt_pointer
to_ring3:
    lidt idt_pointer
    mov $TSS_SEL, %eax
    ltr %ax
    mov $ring0_stack_top, %esp
    pushq $USER_DS
    pushq $user_stack_top
    pushq $0x3002                   # RFLAGS: IOPL 3, interrupts off
    pushq $USER_CS
    pushq $probe_main
    iretq

# A vector is 16 bytes: push what tells the exceptions apart, then the shared part. CPUs push an error code for 8, 10 to
# 14, 17, 21, 29 and 30 only; the others get a zero.
.balign 16
.globl vectors
vectors:
.set n, 0
.rept 32
    .balign 16
    .if (n == 8) || (n >= 10 && n <= 14) || (n == 17) || (n == 21) || (n == 29) || (n == 30)
    .else
    push $0
    .endif
    push $n
    jmp exception
    .set n, n + 1
.endr

# int3 is a service's test and goes on; any other exception is told by ring 3: probe_exception(vector, error, rip, cr2).
exception:
    cmpq $3, (%rsp)
    je 1f
    cmpq $6, (%rsp)
    jne 2f
    cmp $MAGIC, %r11
    je service
2:
    mov (%rsp), %rdi
    mov 8(%rsp), %rsi
    mov 16(%rsp), %rdx
    mov %cr2, %rcx
    mov $ring0_stack_top, %esp
    pushq $USER_DS
    pushq $user_stack_top
    pushq $0x3002
    pushq $USER_CS
    pushq $probe_exception
    iretq
1:  add $16, %rsp
    iretq

# %rax says what, %rdi is its argument; %rax is 0 when it could be done. All other registers are kept but %rcx, %rdx, %rdi.
service:
    add $16, %rsp
    addq $2, (%rsp)                 # go on behind the ud2
    cmp $6, %rax
    ja 9f
    jmp *services(,%rax,8)

service_spin:                       # a loop of %rdi instructions, two to a round
    shr $1, %rdi
    jz 8f
1:  dec %rdi
    jnz 1b
    jmp 8f

service_halt:
    hlt
    jmp service_halt

service_triple:                     # no IDT, then an exception
    lidt null_pointer
    ud2

service_nowhere:                    # an instruction from where there is no memory: no hypervisor can execute that
    mov $NOWHERE, %eax
    jmp *%rax

service_cmpxchg16b:
    push %rbx
    xor %eax, %eax
    xor %edx, %edx
    xor %ecx, %ecx
    mov $1, %ebx
    lock cmpxchg16b scratch
    pop %rbx
    jmp 8f

service_xrstor:                     # needs CR4.OSXSAVE; restores the x87 state from an area of zeros: its initial state
    mov %cr4, %rax
    or $0x40200, %rax
    mov %rax, %cr4
    mov $1, %eax
    xor %edx, %edx
    xrstor xsave_area
    jmp 8f

service_int3:
    int3
8:  xor %eax, %eax
    iretq
9:  mov $-1, %rax
    iretq

.section .rodata, "a"
.balign 8
services:
    .quad service_spin, service_halt, service_triple, service_cmpxchg16b, service_xrstor, service_int3
    .quad service_nowhere
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word idt_end - idt - 1
    .quad idt
null_pointer:
    .word 0
    .quad 0

# Present, writable, user, accessed, dirty: the CPU has nothing to write back.
#define TABLE 0x67
#define PAGE_2M 0xe7

.section .data, "aw"
.balign 4096
pml4:
    .quad pdpt + TABLE
    .fill 511, 8, 0
pdpt:                               # the first 4 GiB, one to one
    .quad pds + TABLE, pds + 0x1000 + TABLE, pds + 0x2000 + TABLE, pds + 0x3000 + TABLE
    .fill 508, 8, 0
pds:
.set n, 0
.rept 2048
    .quad (n << 21) | PAGE_2M
    .set n, n + 1
.endr

.balign 16
gdt:
    .quad 0, 0
    .quad 0x00af9b000000ffff        # 0x10 code, 64 bit, ring 0
    .quad 0x00cf93000000ffff        # 0x18 data, ring 0
    .quad 0x00cff3000000ffff        # 0x20 data, ring 3
    .quad 0x00affb000000ffff        # 0x28 code, 64 bit, ring 3
    .word tss_end - tss - 1, tss_low # 0x30 TSS, 16 bytes; the linker script splits its address
    .byte tss_mid, 0x89, 0, 0
    .quad 0
gdt_end:

.balign 16
.globl tss
tss:
    .long 0
    .quad ring0_stack_top           # RSP0
    .fill 22, 4, 0
    .word 0, 0x68                   # every port is allowed by the I/O bitmap: pagetable KVM loses IOPL in iretq
    .fill 8192, 1, 0
    .byte 0xff
tss_end:

.macro gate low
    .word \low, KERNEL_CS
    .byte 0, 0x8e
    .word vectors_high
    .quad 0
.endm

.balign 16
idt:
.set n, 0
.rept 32
    gate (vectors_low + 16 * n)
    .set n, n + 1
.endr
idt_end:

.section .bss, "aw", @nobits
.balign 64
xsave_area: .skip 4096
scratch: .skip 16
.balign 4096
ring0_stack: .skip 4096
.globl ring0_stack_top
ring0_stack_top:
user_stack: .skip 16384
user_stack_top:

.section .note.GNU-stack, "", @progbits
